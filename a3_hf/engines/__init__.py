"""Any-order decoding inside other people's engines."""
