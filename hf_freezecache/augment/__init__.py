"""Random augmentation that can be repeated: on images, and on cached features."""
