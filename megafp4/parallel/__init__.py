"""Who talks to whom: the mesh, its collectives, and the layers that are cut over ranks."""
