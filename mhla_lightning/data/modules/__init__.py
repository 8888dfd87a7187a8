"""The LightningDataModules, one a kind."""
