"""Shows how a text was generated: replays in a terminal, HTML pages."""
