"""The page of routers."""
