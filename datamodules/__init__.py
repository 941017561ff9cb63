"""Lightning DataModules by kind of data."""
