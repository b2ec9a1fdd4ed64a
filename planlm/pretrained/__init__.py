"""What was trained before: folders of models by name, their tokenizers, and whether their weights are whole."""
