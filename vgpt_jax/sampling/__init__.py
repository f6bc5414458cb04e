"""From a trained generator to pictures: logits -> token -> grid -> pixels -> the best of n. Imports no tensorflow."""
