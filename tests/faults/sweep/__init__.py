"""The fault sweep: each fault at random places, and whether what dtrain said of it is right."""
