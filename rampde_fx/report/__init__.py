"""What was done, for people: explain, its page and its pictures, and the logs."""
