"""How a text was generated, replayed in the terminal and on an HTML page."""
