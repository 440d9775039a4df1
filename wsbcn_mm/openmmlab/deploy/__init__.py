"""From a trained model to something that runs without this package."""
