"""Fine-tuning: the teacher's head, then the three branches with gradient surgery."""
