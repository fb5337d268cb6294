"""What is measured, against whom. Results stand in bench/LOG.md."""
