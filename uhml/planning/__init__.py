"""What a run will cost, before it starts: from a short calibration here, and from the data sheets of other machines."""
