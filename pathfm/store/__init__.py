"""Everything on disk: layout, cohort table, tile store, feature file, atomic commits."""
