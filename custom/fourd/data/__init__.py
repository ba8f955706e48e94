"""Data modules: cameras for text to 4D. Each registers itself; `custom.fourd` lists them."""
