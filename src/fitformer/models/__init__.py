"""What is computed: the layers, the trunk of two phases, and its roles."""
