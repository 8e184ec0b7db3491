"""DGS-Net: fine-tune CLIP with gradient surgery into a detector of generated images, and use it."""
