"""The HTTP server of one machine: OpenAI's and llama.cpp's requests, with blanks that are really filled."""
