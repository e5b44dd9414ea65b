"""What trainers of other libraries need to train with the optimizers here, one library a file."""
