"""Pictures: which there are, how they split into train and test, and how a file becomes an RGB image."""
