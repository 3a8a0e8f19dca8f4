"""What a trained model is used for: labels of files, drawn images, explanations of a decision."""
