"""Many runs: results, tables, figures, pages."""
