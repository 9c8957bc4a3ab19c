"""How the launchers of several nodes meet and stay in touch."""
