"""Statistics and diagnoses of trained models, on the data of their configs."""
