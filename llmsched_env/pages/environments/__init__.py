"""The page of the environments: what there is to learn in each."""
