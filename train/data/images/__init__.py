"""From files of images to arrays of pixels."""
