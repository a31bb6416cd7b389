"""The version of this dtrain, where every room can read it without importing the package's façade."""

VERSION = "0.1.0"
