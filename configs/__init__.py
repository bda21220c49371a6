"""The shipped experiments: one TOML file each, whose header says what it replicates and what it reached here."""
