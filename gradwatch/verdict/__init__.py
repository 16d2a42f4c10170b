"""Signs become alarms, alarms become incidents, incidents get a suspect and an advice. No torch is loaded here."""
