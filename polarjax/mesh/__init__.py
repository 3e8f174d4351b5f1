"""Several devices and processes: the mesh, its cuts, one device's share."""
