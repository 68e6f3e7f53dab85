"""What a person looks at: reports, comparisons, plots, model cards."""
