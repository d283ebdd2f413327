"""Files of images, slab by slab."""
