"""A run's configuration: its schema, where each value came from, and how it is read. No torch here."""

from dtrain.config.schema import BUILDER_SECTIONS, RunConfig
from dtrain.config.settings import Settings, call_settings, load_settings

__all__ = ["BUILDER_SECTIONS", "RunConfig", "Settings", "call_settings", "load_settings"]
