"""From many teachers' predictions to one soft target a row."""
