"""Features of the patches of slides, by a frozen encoder: files that `open_image` and TRIDENT read."""
