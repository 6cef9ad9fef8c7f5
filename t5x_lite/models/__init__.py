"""What architectures are made of: blocks, stacks, whole models, their parameters and what fine-tuning trains of them."""
