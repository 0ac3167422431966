"""What a developer needs beside the services; none of them knows it."""
