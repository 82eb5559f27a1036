"""Number formats: allowed bit widths and granularities, the affine quantiser, weight packing."""
