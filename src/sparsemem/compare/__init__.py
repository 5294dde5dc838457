"""Compare many runs: results, tables, figures and pages."""
