"""What can be learned from: folders, manifests, arrays, datasets of the Hub, texts and files."""
