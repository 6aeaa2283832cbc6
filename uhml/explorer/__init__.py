"""The page that shows a run: the tree, the Poincaré disk, and each picture with its neighbours."""
