"""Writers of the pages that are generated from measurements, a folder each."""
