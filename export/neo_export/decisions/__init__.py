"""What is asked of an export, and what it decides from that before anything is built."""
