"""What runs inside the user's process: joining, stepping, staging and restoring. The only room that imports torch."""
