"""Files on disk: outputs, thumbnails, inputs, and what is in them."""
