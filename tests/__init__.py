"""Tests, in one folder a room."""
