"""Tables, labelled images and sheets."""
