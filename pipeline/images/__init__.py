"""Image files to pixels, and pixels to what each backbone takes."""
