"""The measurements behind every performance claim."""
