"""Read data sets in many formats, and split them into train, validation and test rows."""
