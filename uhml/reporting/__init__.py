"""What people look at: metrics.jsonl, TensorBoard, tables of runs, sheets of pictures."""
