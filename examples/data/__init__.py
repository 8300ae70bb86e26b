"""Public-domain text that ships with kernelize (`kernelize.sample`); README.md names the sources."""
