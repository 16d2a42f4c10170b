"""What auto-clip does to healthy programs whose signal is rare."""
